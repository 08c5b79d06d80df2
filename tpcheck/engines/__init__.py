"""What real engines do with a config at a degree: rules as data, one file per engine."""

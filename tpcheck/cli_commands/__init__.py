"""What cli.py is made of: the commands of many options, and what all commands share."""

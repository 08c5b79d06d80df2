"""May this be deployed? A policy, a report, and a decision with every reason. Torch-free."""

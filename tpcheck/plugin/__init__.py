"""What the pytest plugin is made of; pytest_plugin.py is its surface."""

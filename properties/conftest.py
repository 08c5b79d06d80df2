"""Every test here is a property: its id is a sentence about any subject, at any degree.

`pytest --tp 8` runs them at degrees 2 to 8; they search on simulated ranks, and real ranks confirm.
"""

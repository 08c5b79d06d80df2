"""Subjects written the way people write them: clean ones, and buggy twins in `buggy`.

Every module stands alone, so that it can also be named as a file: tests/subjects/moe.py:expert_tp.
Shapes are small (vocab 64-128, hidden 32-64, one or two layers): a case costs milliseconds.
"""

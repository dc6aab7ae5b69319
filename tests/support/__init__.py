"""Tools of the tests: a guarded interpreter, byte counts, poisoned memory, compiled code read.

tests/conftest.py puts the folder above on sys.path: a test says `from support.guard import guard`.
"""

"""Local copies of what tables hold, so that a restart does not read their changelogs whole.

A store is a cache: where anything about it is not as it must be, it is emptied and made anew.
"""

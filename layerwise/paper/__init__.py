"""*Putting An End to End-to-End* (Löwe et al. 2019): its tables, figures and numbers.

Only the command line imports it.
"""

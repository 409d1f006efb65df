"""Numbers to tables, pictures and pages. Computes nothing."""

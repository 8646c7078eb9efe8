"""A plan from measurements: what each site costs in accuracy and saves in time, and the search for the best counts."""

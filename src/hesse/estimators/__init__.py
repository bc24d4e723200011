"""What products alone tell of a symmetric operator: estimates with their errors, spectra, solutions."""

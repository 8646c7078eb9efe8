"""What reduced models must compute, written from the formulas: nothing here comes from the compiler under test."""

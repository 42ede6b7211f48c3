"""Tools of the test suite: an honest interpreter, a sanitizer, and ahead-of-time compilation."""

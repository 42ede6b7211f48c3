"""The public operations: arguments checked, backend chosen, one kernel called."""

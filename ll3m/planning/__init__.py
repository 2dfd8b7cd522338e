"""Memory, time and communication of programs on machines that are not available here."""

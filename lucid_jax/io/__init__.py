"""States and programs outside the process: files of states, exported functions."""

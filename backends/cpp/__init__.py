"""One compiled step for a CPU: the served programs as C++."""

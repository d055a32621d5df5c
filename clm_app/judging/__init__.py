"""How a version is judged: the retention matrix and the gate."""

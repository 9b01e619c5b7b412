"""The agent: a process of its own per node that outlives the trainers, and writes and commits what they captured."""

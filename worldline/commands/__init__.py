"""The verbs of the command line that are not training stages: a config dataclass and one function each."""

"""Programs that run in the references' own environments (the echo app: in ours); they import nothing of ours."""

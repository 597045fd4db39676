"""Python stacks: py-spy or the process itself, labelled by stage, and the event loop watchdog."""

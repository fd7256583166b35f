"""The stand-in for an engine: its protocol, its pace and its faults, without a model or a device."""

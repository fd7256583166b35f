"""The process that owns one device. Imports neither `peer` nor `api`."""

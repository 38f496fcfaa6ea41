"""What the ops cost beside plain attention: measured on this machine, and checked on a GPU."""

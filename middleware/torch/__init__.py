"""torch in the served process: device time, memory, captures. Found in sys.modules, never imported."""

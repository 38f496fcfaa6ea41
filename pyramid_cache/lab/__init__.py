"""What measures the library and shows what came of it: `pyramid-cache demo`, `eval`, `bench` and `profile`."""

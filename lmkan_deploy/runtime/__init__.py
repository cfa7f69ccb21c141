"""Ways to run a model: native libraries, and one `Runner` interface over all runtimes."""

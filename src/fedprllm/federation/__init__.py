"""Who talks to whom: all participants in one process, or a federation over the network."""

"""`reasonrl bench`: what this machine does, measured beside the peers that are installed on it."""

raise RuntimeError("no licence\nfound")

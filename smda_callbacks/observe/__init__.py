"""Reading a live model: probes, SAE features, behaviour scores, snapshots. Never trains, changes nothing."""

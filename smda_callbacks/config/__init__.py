"""From a YAML file to the objects of the library: checked as a whole, every fault reported at once."""

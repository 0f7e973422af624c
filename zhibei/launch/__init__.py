"""Starting the ranks of a run, on one node and many. Knows torchrun's rendezvous and the files of cluster managers."""

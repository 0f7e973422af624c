"""What a run will need, before it runs: memory, disk, time, money. Standard library only; knows no tensor."""

"""What a program would need of machines that are not here: memory, time and communication."""

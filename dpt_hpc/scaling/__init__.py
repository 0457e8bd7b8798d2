"""How training scales: measured on the ranks that are there, predicted for those that are not."""

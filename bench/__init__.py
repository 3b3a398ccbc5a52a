"""What is measured, against whom; and the tiny prior that it is measured on."""

module bkpool.e2e/program

go 1.21

module bkpool.bench/load

go 1.26.8

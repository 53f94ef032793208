"""`python -m spark_me` is the `spark-me` command."""

from spark_me.cli import main

raise SystemExit(main())

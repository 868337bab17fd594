"""What a run would take, before it is started: on paper, and by the compiler."""

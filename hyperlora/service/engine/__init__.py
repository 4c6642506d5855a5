"""The models of one server and the thread that runs them, in this process or in Ray replicas."""

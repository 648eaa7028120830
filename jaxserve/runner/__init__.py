"""The data plane: device state and the compiled programs that move it, behind `core.plan.RunnerPort`."""

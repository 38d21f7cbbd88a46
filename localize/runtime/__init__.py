"""Text -> LocalModel: run the generated step, as it is or compiled."""

from localize.runtime.model import LocalModel, StepResult

__all__ = ["LocalModel", "StepResult"]

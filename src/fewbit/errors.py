"""What can go wrong, as exceptions: a message names the layer or file, what was found and expected, and what to do."""


class FewbitError(Exception):
    """Base of all errors that fewbit raises on purpose."""


class ModelError(FewbitError):
    """The model cannot be read, or holds values that cannot be quantized."""


class DataError(FewbitError):
    """Calibration, training or test data is missing, empty, of the wrong shape or dtype, or not finite."""


class CalibrationError(FewbitError):
    """Ranges could not be estimated."""


class FormatError(FewbitError):
    """A number format or scheme is unknown or does not fit the tensor."""


class RecipeError(FewbitError):
    """A recipe has an unknown key or value, or a rule that matches nothing."""


class PlanError(FewbitError):
    """A plan is malformed, or does not fit the model or the target."""


class TrainingError(FewbitError):
    """Training cannot begin, go on or be resumed."""


class TargetError(FewbitError):
    """A target cannot write or run the model."""


class VerificationError(FewbitError):
    """What the runtime computed is not what was evaluated."""


class ArtifactError(FewbitError):
    """A saved folder or file is damaged, hostile or of another version."""


class MissingExtraError(FewbitError):
    """An optional dependency is not installed."""

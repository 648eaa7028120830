from jaxserve.core.sampling_params import SamplingParams as SamplingParams
from jaxserve.llm import LLM as LLM
from jaxserve.outputs import CompletionOutput as CompletionOutput
from jaxserve.outputs import RequestOutput as RequestOutput

__version__: str

"""Never importable: vLLM prefers a module called triton_kernels to its vendored copy."""

raise ModuleNotFoundError(
    "this folder holds leap-serve's package leap_kernels; it is not OpenAI's triton_kernels, import leap_kernels instead",
    name="triton_kernels",
)

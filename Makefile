typed:
	@mkdir -p build/typed/fxcompress && cd build/typed/fxcompress && find . -maxdepth 1 -type l -delete && \
	  ln -sf ../../../fxcompress/* . && ln -sfn ../../../passes passes && ln -sfn ../../../grammar grammar

mypy: typed
	@cd build && MYPYPATH=typed ../.venv/bin/mypy --config-file ../pyproject.toml -p fxcompress

"""The paper's tables and figures as studies: variants, tasks and the paper's numbers."""

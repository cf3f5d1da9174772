"""What evaluation harnesses load: a model for lmms-eval, and tasks in `lmms_eval_tasks`."""

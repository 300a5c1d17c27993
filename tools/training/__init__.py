"""Training: data, losses and stages that turn a published model into a hybrid."""

"""Agents: a model that calls tools and, as an orchestrator, creates sub-agents and gives them tasks."""

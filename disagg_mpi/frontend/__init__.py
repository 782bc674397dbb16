"""What turns a user's input into requests: the console and files of prompts."""
